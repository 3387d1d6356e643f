"""Text and its labels: sentences, tags, files, corpora. Nothing here imports torch."""
