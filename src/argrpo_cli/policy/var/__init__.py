"""VAR: images scale by scale, from one token to a full grid (Tian et al. 2024, arXiv:2404.02905)."""
