"""What README and the notebooks say they found, each sentence held against a row of a table.

notebooks/claims.yaml names the sentence, its table and row, and what the row must bear: 'more',
'less', 'equal' or 'open'. The numbers are never typed: figures/claims.csv and README take them from
the row, and a test fails when the row no longer bears the sentence.
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kdlib.lab.tables import CONTRASTS, MARGIN
from kdlib.text.files import ROOT, write_text

COLUMNS = ["claim", "says", "table", "figure", "difference", "low", "high", "seeds_low"]
COLUMNS += ["seeds_high", "seeds", "verdict", "named", "bears", "holds"]


def checked(root: Path = ROOT) -> pd.DataFrame:
    """One row a claim: claim, says, table, figure if drawn, difference, both intervals, seeds,
    verdict, named (its contrast was named beforehand and its p corrected; else it is exploratory),
    bears, holds.

    ValueError for a claim whose row is not there, or is not one.
    """
    rows = yaml.safe_load((root / "notebooks" / "claims.yaml").read_text(encoding="utf8"))
    found = [_checked(name, claim, root / "figures") for name, claim in rows.items()]
    return pd.DataFrame(found, columns=COLUMNS)


def _checked(name: str, claim: dict[str, Any], figures: Path) -> dict[str, Any]:
    table = pd.read_csv(figures / claim["table"])
    for column, value in claim["row"].items():
        table = table[table[column] == value]
    if len(table) != 1:
        raise ValueError(f"claim {name}: expected one row of {claim['table']}, got {len(table)}")
    row = table.iloc[0]
    found = {"claim": name, "says": claim["says"], "table": claim["table"]}
    drawn = claim["table"].replace(".csv", ".svg")
    found["figure"] = drawn if (figures / drawn).exists() else ""
    intervals = ["difference", "low", "high", "seeds_low", "seeds_high"]
    found |= {column: round(float(row[column]), 2) for column in intervals}
    bears = borne(row)
    found["seeds"] = int(row["seeds"]) if "seeds" in row else claim["seeds"]
    verdicts = {"more": "shown", "less": "shown", "equal": "equal", "open": "not shown"}
    named = "holm" in row and (row["method"], row["against"]) in CONTRASTS
    found |= {"verdict": verdicts[bears], "named": named}
    return found | {"bears": claim["bears"], "holds": bears == claim["bears"]}


def borne(row: pd.Series) -> str:
    """'more' or 'less' where the difference is shown, 'equal', or 'open': by the row's own verdict,
    or where it has none by both of its 95 % intervals, equal where they lie within MARGIN of 0."""
    if row[["low", "high", "seeds_low", "seeds_high"]].isna().any():
        return "open"
    ends = [row["low"], row["seeds_low"], row["high"], row["seeds_high"]]
    apart, within = min(ends) > 0 or max(ends) < 0, max(map(abs, ends)) < MARGIN
    computed = "shown" if apart else "equal" if within else "not shown"
    verdict = row.get("verdict", computed)
    if verdict == "shown":
        return "more" if row["difference"] > 0 else "less"
    return "equal" if verdict == "equal" else "open"


def write(root: Path = ROOT) -> pd.DataFrame:
    """figures/claims.csv, made anew; returns it."""
    claims = checked(root)
    csv = claims.to_csv(index=False, lineterminator="\n")
    write_text(root / "figures" / "claims.csv", csv)
    return claims


def fill(text: str, claims: pd.DataFrame) -> str:
    """A text with the numbers of every `<!-- claim NAME -->...<!-- -->` printed anew."""
    of = claims.set_index("claim")

    def numbers(found: re.Match) -> str:
        row = of.loc[found[1]]
        told = f"{row['difference']:+.2f} [{row['low']:.2f}, {row['high']:.2f}] ({row['verdict']})"
        return f"<!-- claim {found[1]} -->{told}<!-- -->"

    return re.sub(r"<!-- claim (\w+) -->.*?<!-- -->", numbers, text)
