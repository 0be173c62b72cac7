"""Numbers of the AR-GRPO paper (Yuan et al. 2025) to print beside our own.

Class-conditional rows are IS, FID, sFID, precision, recall; GenEval rows position, colours, attribute binding,
counting, single object, two objects, overall. Table 2's are those of LlamaGen-B at 256 pixels. DrawBench rows are CLIP
score, HPSv2, aesthetic, DeQA, ImageReward, PickScore, UnifiedReward, of LlamaGen-XL at 256 pixels.
"""

from __future__ import annotations

_BASE_B256 = [193.61, 5.46, 7.50, 0.84, 0.46]
_TRAINED_B256 = [211.67, 5.91, 8.58, 0.86, 0.40]
_BASE_T2I = [0.042, 0.550, 0.032, 0.197, 0.750, 0.263, 0.306]
_TRAINED_T2I = [0.040, 0.593, 0.030, 0.228, 0.791, 0.263, 0.324]
_BASE_DRAWBENCH = [0.245, 0.153, 4.701, 0.546, -1.784, 0.737, 0.271]
_TRAINED_DRAWBENCH = [0.274, 0.208, 4.808, 0.551, -0.712, 0.769, 0.312]

TABLE_2_ALL = {  # by the policy that training begins with: before and after
    "c2i-b-256": {"base": _BASE_B256, "trained": _TRAINED_B256},
    "c2i-b-384": {"base": [157.17, 6.44, 7.49, 0.81, 0.46], "trained": [195.45, 7.64, 6.84, 0.88, 0.34]},
    "c2i-l-384": {"base": [256.07, 3.08, 6.09, 0.83, 0.52], "trained": [264.64, 4.24, 5.91, 0.87, 0.44]},
    "c2i-xl-384": {"base": [286.88, 2.78, 5.57, 0.84, 0.54], "trained": [293.07, 3.63, 5.99, 0.86, 0.48]},
}
TABLE_2 = {"LlamaGen (base)": _BASE_B256, "AR-GRPO": _TRAINED_B256}
TABLE_3 = {"LlamaGen (base)": _BASE_T2I, "AR-GRPO": _TRAINED_T2I}
TABLE_3_COLUMNS = ("position", "colors", "color_attr", "counting", "single_object", "two_object", "overall")
TABLE_4 = {"LlamaGen (base)": _BASE_DRAWBENCH, "AR-GRPO": _TRAINED_DRAWBENCH}
TABLE_5 = {"base": _BASE_B256, "without KL": [220.57, 7.83, 11.72, 0.88, 0.32], "with KL": _TRAINED_B256}
TABLE_6 = {
    "base": _BASE_B256,
    "A": [215.49, 6.00, 8.65, 0.87, 0.39],
    "B": [205.41, 5.77, 7.76, 0.87, 0.40],
    "C": [230.95, 6.55, 8.68, 0.88, 0.37],
    "D": _TRAINED_B256,
}
TABLE_7 = {
    "base": _BASE_T2I,
    "A": [0.025, 0.460, 0.010, 0.097, 0.634, 0.126, 0.225],
    "B": [0.047, 0.495, 0.013, 0.147, 0.659, 0.162, 0.254],
    "C": [0.025, 0.484, 0.018, 0.150, 0.684, 0.197, 0.260],
    "D": _TRAINED_T2I,
}
TABLE_8 = {
    "base": _BASE_DRAWBENCH,
    "A": [0.272, 0.203, 4.789, 0.541, -0.805, 0.767, 0.307],
    "B": [0.274, 0.206, 4.770, 0.536, -0.726, 0.769, 0.314],
    "C": [0.274, 0.209, 4.808, 0.555, -0.683, 0.770, 0.316],
    "D": _TRAINED_DRAWBENCH,
}
