"""Which head helps on some data: frozen-feature and sweep comparisons, their statistics and report."""
