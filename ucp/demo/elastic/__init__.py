"""The elastic demo: a job under torchrun whose nodes are killed, taken away and given back while it trains."""
