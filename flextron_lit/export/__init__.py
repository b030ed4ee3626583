"""One sub-network as a stand-alone model: stock classes, own classes beside their weights, GGUF."""
