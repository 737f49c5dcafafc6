"""A store out of bounds, for ``tests/sanitizer.py`` to catch: ``append_kv`` with a slot one block past its cache."""

import torch

import pagedattn

rows = torch.randn(1, 2, 64, device="cuda", dtype=torch.float16)
caches = torch.zeros(2, 4, 16, 2, 64, device="cuda", dtype=torch.float16).unbind()
pagedattn.append_kv(rows, rows, caches[1], caches[1], torch.tensor([4 * 16 + 3], device="cuda"))
torch.cuda.synchronize()
