"""What a build did: where each tensor came from, what each expert changed, and what was proven."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..trace.colours import looks

REPORT_FILE = "build_report.json"


@dataclass
class BuildReport:
    """The record of one `build_moe`; saved beside the model as build_report.json."""

    output_dir: Path  # the new checkpoint
    base: str  # folder or hub id of the base
    expert_sources: list[str]  # folders or hub ids of the experts
    expert_names: list[str]  # E names
    experts_per_token: int  # K
    router: str
    layers: list[int]  # the L layers that became MoE layers
    verified: bool  # read back: every copied tensor bit-equal to its source
    # [E]: relative change of the tensors not taken, by group (large tensors are sampled)
    left_behind: list[dict[str, float]]
    # [E][L]: ||expert - base|| / ||base|| of a layer's MLP (Frobenius norms over both matrices)
    change: list[list[float]] = field(default_factory=list)
    identical_experts: list[tuple[str, str]] = field(default_factory=list)  # taken MLPs bit-equal
    equal_to_base: list[str] = field(default_factory=list)  # experts that took over the base's MLPs
    shards: list[str] = field(default_factory=list)  # file names
    bytes_written: int = 0  # of tensors
    total_parameters: int = 0
    active_parameters: int = 0  # total less the experts that a token does not use
    tensors_from_experts: int = 0  # copied from an expert
    tensors_from_base: int = 0  # copied from the base
    tensors_new: int = 0  # gates
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)  # one sentence each

    def table(self) -> str:
        """Show as plain text what was built, and the relative change per layer and expert."""
        proof = "read back, bit-equal to their sources" if self.verified else "not read back"
        lines = [
            f"{len(self.expert_names)} experts, {self.experts_per_token} per token, router "
            f"{self.router}, {len(self.layers)} MoE layers -> {self.output_dir}",
            f"{_count(self.total_parameters)} parameters, {_count(self.active_parameters)} active "
            f"per token, {self.bytes_written / 1e9:.3f} GB in {len(self.shards)} "
            f"file{'s' * (len(self.shards) > 1)}, {self.seconds:.1f} s",
            f"{self.tensors_from_experts} tensors from the experts, {self.tensors_from_base} from "
            f"the base ({proof}), {self.tensors_new} new (gates)",
            "",
            "MLP change relative to the base, by layer",
        ]
        rows = [["layer", *self.expert_names]]
        for column, layer in enumerate(self.layers):
            rows.append([str(layer), *(f"{row[column]:.4f}" for row in self.change)])
        rows.append(["mean", *(f"{_mean(row):.4f}" for row in self.change)])
        lines += _align(rows)
        lines += ["", "change outside these MLPs, left behind (sampled)"]
        rows = [["group", *self.expert_names]]
        for group in self.left_behind[0]:
            rows.append([group, *(f"{groups[group]:.4f}" for groups in self.left_behind)])
        lines += _align(rows)
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def plot(self, ax=None):
        """Draw the relative change of each expert's MLPs over the layers.

        Args:
            ax: matplotlib axes to draw into; made if not given.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
        for look, name, row in zip(
            looks(self.expert_names), self.expert_names, self.change, strict=True
        ):
            ax.plot(self.layers, row, color=look.colour, marker=look.marker, label=name)
        ax.set_xlabel("layer")
        ax.set_ylabel("relative change of the MLP")
        ax.set_title("What each expert changed of the base")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
        return ax

    def as_dict(self) -> dict:
        """Give the report as plain values for JSON; numbers that are not finite become None."""
        values = asdict(self)
        values["output_dir"] = str(self.output_dir)
        values["identical_experts"] = [list(pair) for pair in self.identical_experts]
        values["change"] = [[_finite(x) for x in row] for row in self.change]
        values["left_behind"] = [
            {group: _finite(x) for group, x in groups.items()} for groups in self.left_behind
        ]
        return values

    def save(self, file: Path) -> None:
        """Write the report as JSON."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        file.write_text(text + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "BuildReport":
        """Read the report that lies beside a model.

        Args:
            folder: the model's folder.
        """
        values = json.loads((Path(folder) / REPORT_FILE).read_text("utf-8"))
        values["output_dir"] = Path(values["output_dir"])
        values["identical_experts"] = [tuple(pair) for pair in values["identical_experts"]]
        values["change"] = [[_number(x) for x in row] for row in values["change"]]
        values["left_behind"] = [
            {group: _number(x) for group, x in groups.items()} for groups in values["left_behind"]
        ]
        return cls(**values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.2f}{unit}"
    return str(parameters)


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = [row[0].ljust(widths[0]) for row in rows]
    rest = [[cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)] for row in rows]
    return ["  ".join([head, *cells]) for head, cells in zip(first, rest, strict=True)]
