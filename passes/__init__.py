"""The `qcompiler.passes` package (this folder is linked into `qcompiler/`)."""

if __name__ != "qcompiler.passes":
    raise ImportError("import qcompiler.passes, not passes: a second copy of the module would not share its state")
