"""The nano world: 64x64 scenes of everyday objects, small models of the paper's architectures, and their judge."""
