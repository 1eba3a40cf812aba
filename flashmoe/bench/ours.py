"""Our kernel as a work to be timed: built, loaded, run once, and held to the reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flashmoe.bench.machine import Machine, TimedEngine
from flashmoe.bench.stopwatch import Prepared
from flashmoe.config import MoEConfig, MoEWeights
from flashmoe.errors import FlashmoeError
from flashmoe.numerics import check_output, check_routing
from flashmoe.world.base import EngineOptions, Launch, Status


@dataclass
class Ours:
    """An engine that ran once: its result, joined over the ranks and on the device."""

    engine: TimedEngine
    y: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    parts: list[torch.Tensor] = field(repr=False)

    @classmethod
    def build(
        cls,
        machine: Machine,
        config: MoEConfig,
        weights: MoEWeights,
        parts: list[torch.Tensor],
        routed: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
        **options: Any,
    ) -> Ours:
        """An engine with one rank a part, loaded and launched; ``routed`` are external ids.

        Raises FlashmoeError where it does not fit or does not end well.
        """
        settings = EngineOptions(
            ranks=len(parts),
            device=machine.device.index or 0,
            **options,
        )
        engine = machine.build(config, weights, [len(p) for p in parts], settings)
        if routed is None:
            engine.load(parts)
        else:
            engine.load(parts, *routed)
        _ended_well(engine.launch())
        y, ids, chosen = cls._joined(engine, machine)
        return cls(engine, y, ids, chosen, parts)

    @staticmethod
    def _joined(
        engine: TimedEngine, machine: Machine
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs = engine.outputs()
        y, ids, weights = (
            torch.cat([getattr(out, name) for out in outputs]).to(machine.device)
            for name in ("y", "ids", "weights")
        )
        return y, ids, weights

    def prepare(self, machine: Machine) -> Prepared:
        """The engine as a graph that the stopwatch replays."""
        return machine.stopwatch.prepare(self.engine.enqueue)

    def check(self, config: MoEConfig, weights: MoEWeights) -> dict[str, Any]:
        """The verdicts on the first launch: ``output``, and ``routing`` where the kernel routed."""
        x = torch.cat(self.parts).to(self.y.device)
        verdicts: dict[str, Any] = {
            "output": asdict(check_output(self.y, x, weights, config, self.ids, self.weights)),
            "routing": None,
        }
        if config.routing.kind != "external":
            routing = check_routing(x, weights, config, self.ids, self.weights)
            verdicts["routing"] = asdict(routing)
        return verdicts

    def check_again(self, machine: Machine) -> str:
        """Why the launches that were timed are not to be trusted; empty where they are.

        An abort is sticky and results are the same bits on every run, so one more launch tells.
        """
        try:
            _ended_well(self.engine.launch())
        except FlashmoeError as exc:
            return f"after timing {exc.message}"
        y, _, _ = self._joined(self.engine, machine)
        same = torch.equal(y.view(torch.int16), self.y.view(torch.int16))
        return "" if same else "results differ before and after timing"


def _ended_well(launch: Launch) -> None:
    if launch.status is not Status.OK:
        raise FlashmoeError(
            f"our launch ended with {launch.status.name}",
            "flashmoe run tells more of the same shape",
        )


def ok(verdicts: dict[str, Any]) -> bool:
    """Whether output and routing were right."""
    routing = verdicts["routing"]
    return bool(verdicts["output"]["ok"] and (routing is None or routing["ok"]))
