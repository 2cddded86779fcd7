from mhc_compile.errors import warn

__all__ = ["warn"]
