"""How it is measured: studies, training, a cache, tables, figures, notebooks in batch."""
