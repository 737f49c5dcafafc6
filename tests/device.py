"""Where the op tests run: CUDA if there is one, else the CPU with the reference or (TRITON_INTERPRET=1) the kernels."""

from __future__ import annotations

import os

import torch

from pagedattn.ops import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
IS_CUDA = DEVICE.type == "cuda"
IS_HOPPER = IS_CUDA and torch.cuda.get_device_capability()[0] == 9
# compute-sanitizer looks at every access, and sees none of those that a vendor's product makes with the copy engine:
# under it cases are small, and what they are compared with is computed on a CPU.
SANITIZED = "PAGEDATTN_SANITIZED" in os.environ
IS_LARGE = IS_CUDA and not SANITIZED
# The interpreter computes bf16 dots wrongly, so there bf16 is left to a GPU.
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16, torch.float32)
