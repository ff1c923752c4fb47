"""The cases: each file defines ``CASES``."""
