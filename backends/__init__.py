"""The `qcompiler.backends` package (this folder is linked into `qcompiler/`)."""

if __name__ != "qcompiler.backends":
    raise ImportError("import qcompiler.backends, not backends: a second copy of the module would not share its state")
