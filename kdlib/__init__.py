"""kdlib: knowledge distillation for named entity recognition, small enough to read.

The face is what the papers are about; read it in this order:

    losses      one pure function an equation       crf         the linear-chain CRF
    methods     each method, declared once          batches     words -> word pieces -> Batch
    models      encoders, Tagger                    twin_tower  any labels, GLiNER's calls

    students/   small models from a pretrained encoder: cut, thin, BiLSTM, twin tower
    teachers/   a tagger, any Hugging Face token classifier, a GLiNER, MSD's teacher that learns
    text/       sentences, tags, files, corpora, the demo grammar; no torch
    lab/        how it is measured: Study, training, cache, records, tables, figures, notebooks
    ship/       a tagger of your own: distil, export, and a runtime that needs no torch

Imports run one way: text <- crf <- losses <- batches <- models <- twin_tower <- methods <- students
<- teachers <- lab <- ship. The core never caches and never draws; the lab never computes a loss.

Symbols, in code and in docstrings:

    B            sentences in a batch         emissions    [B, L, K] scores of labels a word
    L            words in the longest         mask         [B, L] bool, True on words, padding right
    K            labels (IOB2 tags)           tags         [B, L] gold labels as numbers
    student, teacher                          both sides of a comparison, as a Chain or as logits
    temperature  T: scores are divided by it  alpha        weight of gold against the teacher, eq. 6
    k            the teacher's k best paths   theta        weight of imitation, adaptive eq. 15
    weight_temperature  tau_w of the paths    m, g         a student's layer, its teacher's
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`kdlib.distil`, when it is asked for: importing kdlib imports nothing."""
    if name == "distil":
        from kdlib.ship.distil import distil

        return distil
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}")
