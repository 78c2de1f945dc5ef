"""Files of documents in, batches of windows out."""
