"""What `--help` prints: of a job all its keys, with type, default and meaning, as the reference pages have them."""

import textwrap

from rayseg import keys

# In the order in which a project uses them.
JOBS = (
    "demo", "catalog", "plan", "prepare", "train", "tune", "crossvalidate", "evaluate", "compare", "promote", "segment",
    "diff", "serve", "benchmark",
)  # fmt: skip
_WIDTH = 100
COMMANDS = {
    "init": "Looks at a folder of images and masks, and writes a recipe that runs.",
    "run": "Runs the stages of a recipe that are not done, from catalog to segment.",
    "ask": "Has a service segment an image, a volume or a series.",
    "schema": "Prints a JSON schema of recipes, for editors.",
    "doctor": "Looks at this machine, and says what is missing and what to do.",
}


def overview() -> str:
    """Help of the command `rayseg`."""
    rows = [(job, _summary(job)) for job in JOBS] + list(COMMANDS.items())
    width = max(len(name) for name, _ in rows) + 2
    lines = ["usage: rayseg JOB [--config RECIPE.yaml] [--set KEY=VALUE ...]", ""]
    lines += ["Segmentation of medical images on Ray. Research software, not a medical device.", ""]
    for name, text in rows:
        lines += textwrap.wrap(text, _WIDTH, initial_indent=f"  {name:{width}}", subsequent_indent=" " * (width + 2))
    return "\n".join([*lines, "", "`rayseg JOB --help` shows the keys of a job."])


def of_job(job: str) -> str:
    """Help of a job."""
    lines = [f"usage: rayseg {job} [--config RECIPE.yaml] [--set KEY=VALUE ...] [--json FILE]", ""]
    lines += [*textwrap.wrap(_summary(job), _WIDTH), ""]
    lines += ["--config RECIPE.yaml  a recipe; the job reads its own section"]
    lines += ["--set KEY=VALUE       sets one key; the value is YAML; may be given several times"]
    lines += [
        "--json FILE           writes the result to a file; without it, it is the last line, or a table on a terminal",
        "",
    ]
    lines += ["Keys:"]
    return "\n".join([*lines, *_lines(keys.of_job(job))])


def _summary(job: str) -> str:
    text = keys.summary(job)
    return text[:1].upper() + text[1:]


def _lines(group: keys.Group) -> list[str]:
    lines = []
    for key in group.keys:
        if key.job:
            lines += [f"  {key.name}: section of the job, see rayseg {key.job} --help"]
            continue
        default = {"": "", "(needed)": ", needed", '`""`': ""}.get(key.default, f", default {key.default}")
        lines += [f"  {key.name}: {key.kind}{default}".replace("`", "")]
        lines += textwrap.wrap(key.meaning.replace("`", ""), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        if key.group:
            lines += _lines(key.group)
    return lines
