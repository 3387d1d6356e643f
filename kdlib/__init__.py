"""kdlib: knowledge distillation for named entity recognition, small enough to read.

Read it the way data flows; a module imports only modules that stand before it:

    cache        digests, atomic files, locks           labels       IOB1 / IOB2 / IOBES / BMES <-> spans, legal transitions
    readers      files -> Sentence                      data         data sets by name
    demo         the generated demo corpus              backbones    pretrained encoders, students
    layers       attention scores and hidden states     vocabulary   fewer word pieces
    projection   a wide encoder's weights in a thin one
    crf          the linear-chain CRF                   surrogates   a CRF's k best paths as labels
    batches      words -> word pieces -> Batch          twin_tower   TwinTower: any labels, GLiNER's calls
    models       Tagger = encoder -> emissions -> CRF; TwinTower
    losses       one pure function per equation         teachers     what a teacher says and holds, computed once
    metrics      scores, intervals, paired tests        gliner_teacher  a GLiNER, loaded or trained, and its soft labels
    train        fit(): one loop for every model and loss
    meta         a teacher that learns from its student's quiz
    reports      tables of runs, paired differences
    experiments  CRF methods x seeds -> runs            open_experiments  GLiNER -> LSTM: both protocols, both references
    layer_experiments  adaptive distillation, its baselines and stages
    plots        figures and tables on disk             study        the notebooks, in batch
    speed        milliseconds, taken in turns           costs        milliseconds and memory of an update, by method
    bench        speed, side by side

Symbols, in code and in docstrings:

    B            sentences in a batch         emissions    [B, L, K] scores of labels per word, before the CRF
    L            words in the longest         mask         [B, L] bool, True on words; padding on the right
    K            labels (IOB2 tags)           tags         [B, L] gold labels as numbers
    student, teacher                          their emissions (or logits) for the same batch
    temperature  T: scores are divided by it  alpha        weight of the gold labels against the teacher, eq. 6
    k            the teacher's k best paths   weight_temperature  tau_w: of the weights of these paths
    theta        weight of imitation, eq. 15  m, g          a student's layer, and the teacher's it learns from
"""

__version__ = "0.1.0"
