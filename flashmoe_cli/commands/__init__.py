"""The verbs, one file each: they parse, call the library, and hand the result to ``render``."""
