"""The bundled benchmark: scans of handwritten digits in MMEB's form."""
