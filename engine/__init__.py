"""The serving engine: requests, paged KV blocks, scheduling, the decoder, sampling and the step loop.

Imported as ``pagedattn.engine``. It calls ``pagedattn`` ops only, never a kernel.
"""
