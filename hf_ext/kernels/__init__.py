"""Triton kernels, one operation a file, each beside a plain torch reference of the same signature.

Nothing here is imported by `import hf_ext`, and Triton itself is needed only when a kernel is launched.
"""
