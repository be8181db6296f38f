"""`report.md`, a table ready to paste, and what both reports tell besides it."""

import shlex
from pathlib import Path

from mmdiff.sweeps import budget, page
from mmdiff.sweeps.results import Results, read_results
from mmdiff.sweeps.table import NOTES, cautions, final_table, findings, markdown
from mmdiff.training.workdir import flat, write_whole


def write_report(workdir: Path, out: Path) -> list[Path]:
    """Write report.html and report.md into `out`.

    Raises:
      DataError: there is no sweep in `workdir`.
    """
    results = read_results(workdir)
    facts = Facts(results)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.html", page.render(results, facts)), ("report.md", as_markdown(results, facts))):
        write_whole(out / name, text.encode())
    return [out / "report.html", out / "report.md"]


class Facts:
    """What a report says besides its numbers."""

    def __init__(self, results: Results):
        plan = results.plan
        self.results = results
        self.runs = sum(len(arm.planned.seeds) for arm in results.arms)
        self.finished = sum(len(arm.finished) for arm in results.arms)
        arms = f"{len(results.arms)} arm{'s' * (len(results.arms) != 1)}"
        self.summary = (
            f"{arms}, {budget.parse(plan.budget).words} of training for each run; {self.finished} of {self.runs} runs "
            f"finished. Baseline: {plan.baseline}. Begun {plan.created}."
        )

    def differences(self) -> dict[str, list[str]]:
        """For each arm but the first, the fields in which it differs from the baseline: `name: theirs -> its own`."""
        first, *others = self.results.arms
        base = flat(first.planned.config)
        return {
            arm.name: [
                f"{field}: {base.get(field)} → {value}"
                for field, value in flat(arm.planned.config).items()
                if value != base.get(field) and field != "name"
            ]
            for arm in others
        }

    def commands(self) -> dict[str, str]:
        """For each arm that was planned, how to train it again, seeds and evaluation included."""
        plan, commands = self.results.plan, {}
        for arm in self.results.arms:
            if arm.planned.steps:
                words = ["mmdiff", "sweep", plan.file, "--arms", arm.name, "--budget", f"{arm.planned.steps}steps-per-arm"]
                commands[arm.name] = shlex.join([*words, "--workdir", f"runs/again_{arm.name}", *plan.overrides])
        return commands

    def seeds(self) -> str:
        told = [f"{arm.name} {', '.join(map(str, arm.planned.seeds))}" for arm in self.results.arms]
        return "; ".join(told)

    def setup(self) -> dict[str, str]:
        """Hardware, versions, code and seeds, by name."""
        plan = self.results.plan
        environment = dict(plan.environment)
        rows = {"command": plan.command, "date": plan.created, "seeds": self.seeds()}
        for name in ("processor", "devices", "system"):
            if name in environment:
                rows[name] = environment.pop(name)
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in environment.items())
        rows["code"] = "; then ".join(
            f"mmdiff {c['version']}, " + (f"commit {c['commit']}, " if "commit" in c else "") + f"source {c['fingerprint']}"
            for c in plan.code
        )
        for arm in self.results.arms:
            if arm.planned.environment:
                told = ", ".join(f"{name} {value}" for name, value in arm.planned.environment.items())
                rows[f"{arm.name} was measured elsewhere"] = told
        return rows


def as_markdown(results: Results, facts: Facts) -> str:
    """The report without its pictures."""
    parts = [f"# {results.plan.question}", facts.summary, markdown(final_table(results))]
    parts.append("\n".join(f"- {line}" for line in findings(results)))
    for title, rows in (
        ("Not finished", results.missing),
        ("Failed", results.failed),
        ("Compare with care", cautions(results)),
    ):
        if rows:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {what}: {why}" for what, why in rows))
    parts.append("## How to read it\n\n" + "\n".join(f"- {note}" for note in NOTES))
    differ = "\n".join(f"- {name}: {', '.join(f'`{d}`' for d in fields)}" for name, fields in facts.differences().items())
    parts.append(f"## What differs from {results.plan.baseline}\n\n{differ}" if differ else "")
    commands = "\n".join(f"    {command}" for command in facts.commands().values())
    parts.append(f"## To repeat an arm\n\n{commands}" if commands else "")
    parts.append("## Made with\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.setup().items()))
    return "\n\n".join(part for part in parts if part) + "\n"
