"""The page that a pipeline ends with: trade-off, widths, texts and origin of a network, all in one file."""
