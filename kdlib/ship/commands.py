"""The commands that make a tagger of your own and use it: `kdlib distil`, `kdlib predict`."""

import json
import sys
from typing import Annotated

import typer

from kdlib.lab.commands import app

TEACHER = "A GLiNER, a Hugging Face token classifier or a kdlib tagger, by folder or hub name; a "
TEACHER += "spaCy pipeline's folder, or a file of labelled sentences (.jsonl, .json, CoNLL), whose "
TEACHER += "labels are learnt as they are."
TEXT = "A file of lines, a folder of .txt files, or a file of sentences; not with a labelled file."
GOLD = "Labelled sentences: two thirds to learn from, a third to be tested on."


@app.command()
def distil(
    teacher: Annotated[str, typer.Option(help=TEACHER)],
    out: Annotated[str, typer.Option(help="The student's folder; NAME.rejected if it fails.")],
    text: Annotated[str | None, typer.Option(help=TEXT)] = None,
    labels: Annotated[str, typer.Option(help='What to ask a GLiNER for: "drug,disease".')] = "",
    gold: Annotated[str | None, typer.Option(help=GOLD)] = None,
    student: Annotated[
        str,
        typer.Option(
            help="bilstm; thin: a Transformer of three narrow layers; twin: a twin tower, which "
            "can be asked for other labels too."
        ),
    ] = "bilstm",
    minutes: Annotated[float, typer.Option(help="Of training, after the teacher has read.")] = 10.0,
    columns: Annotated[
        str, typer.Option(help='Of CoNLL files, if not word first, tag last: "tag,word".')
    ] = "",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out, and name, what cannot be read.")
    ] = False,
    at_least: Annotated[
        tuple[float, float],
        typer.Option(help="Agreement F1 and recall of each type with the teacher, in percent."),
    ] = (90.0, 80.0),
    encoder: Annotated[str, typer.Option(help="Whose word pieces and table it begins with.")] = (
        "minilm"
    ),
) -> None:
    """Train a small tagger on what your teacher says of your text; write it as a folder that needs
    no torch, with a card. Exit code 1 if it does not come close enough to its teacher.

    Stopped at any moment, the same command goes on where it was.

    Example: kdlib distil --teacher urchade/gliner_small-v2.1 --labels "drug,disease"
    --text notes/ --out student
    """
    from kdlib.ship.distil import Gate
    from kdlib.ship.distil import distil as run

    asked = [label.strip() for label in labels.split(",") if label.strip()]
    try:
        given = teacher, out, text, asked, gold, student, minutes
        how = {"columns": [c for c in columns.split(",") if c], "skip_bad": skip_bad}
        how |= {"gate": Gate(*at_least), "encoder": encoder, "say": typer.echo}
        card = run(*given, **how)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(0 if card["passed"] else 1)


@app.command()
def predict(
    student: Annotated[str, typer.Argument(help="A folder that `kdlib distil` wrote.")],
    threshold: Annotated[
        float | None, typer.Option(help="Least score; by default each label's own.")
    ] = None,
) -> None:
    """Read lines of text, write a JSON line for each with its entities, in constant memory.

    Example: kdlib predict student/ < text.txt > spans.jsonl
    """
    from kdlib.ship import runtime

    try:
        tagger = runtime.load(student)
        lines = (line.rstrip("\n") for line in sys.stdin)
        for text, found in tagger.stream(lines, threshold):
            typer.echo(json.dumps({"text": text, "entities": found}, ensure_ascii=False))
    except BrokenPipeError:  # whoever reads has enough
        raise typer.Exit(0) from None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="cost, crf, gliner, inference, shipped_CORPUS, students, surrogates, updates."
        ),
    ],
) -> None:
    """Measure speed side by side in one run, and write figures/bench/NAME.csv.

    crf: against pytorch-crf and torch-struct. gliner: the twin tower against GLiNER in torch, ONNX
    and int8. students: small Transformers in turns with their teacher. surrogates: k-best labels
    beside the teacher's forward passes. inference: what a user waits for, GLiNERs, teacher and
    student, in torch and in onnxruntime (and GLiNER by fast_gliner, where $KDLIB_FAST_GLINER names
    a Python that has it). updates: what one update costs, by method. cost: the CPU-seconds of a
    student of WikiAnn (from $KDLIB_DATA), its teacher's work included.
    shipped_conll2003 (or ncbi_disease, wnut17, from $KDLIB_DATA): ten minutes of `distil` beside
    spaCy's tagger on the same labels.
    """
    from kdlib.lab import bench as benchmarks
    from kdlib.ship.bench import inference
    from kdlib.ship.peers import PEERS

    try:
        benchmarks.run(name, benchmarks.BENCHMARKS | {"inference": inference} | PEERS)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
