"""How far a kernel may differ from its op's function in float32: type -> (largest difference, why it may be that large).

Both start from the same rounded inputs; a difference is divided by max(1, |expected|) first. The function is run in
float32 for every type, so these limits see the kernel's rounding only.
"""

LIMITS = {
    "float32": (1e-5, "sums of at most 1100 float32 products in another order; measured 2e-6"),
    "float16": (
        2e-3,
        "z and y are rounded to float16 (2^-11 of z, of y), everything between is float32; measured 9e-4",
    ),
    "bfloat16": (
        1.6e-2,
        "z and y are rounded to bfloat16 (2^-8 of z, of y), everything between is float32; measured 9e-3",
    ),
}
