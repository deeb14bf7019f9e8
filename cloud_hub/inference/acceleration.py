"""Moves models from ONNX Runtime to TensorRT when there is a plan for them, and back if need be.

``plan_policy.decide`` says what to do, this file does it: one task for each served model. ONNX
Runtime answers meanwhile; the engines of the other kind are loaded and warm before they take
over, between two batches, so no request fails or waits for the switch.

Without a GPU or without TensorRT nothing of this runs, and the reason is logged once.
"""

import asyncio
import importlib.util
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import structlog

from cloud_hub.engines.engine import Engine
from cloud_hub.engines.launch import Launcher
from cloud_hub.engines.tensorrt.errors import GpuUnavailable, PlanRefused, PlanUnusable
from cloud_hub.engines.tensorrt.plan_key import Profile, bounds_from, profile_for
from cloud_hub.engines.tensorrt.plan_policy import Action, Failure, Situation, decide
from cloud_hub.engines.tensorrt.plans import PlanBuilder, find_platform
from cloud_hub.errors import ModelRefused
from fogline_protocol.model_config import ModelConfig

LOOK_S = 2.0  # between two looks at whether TensorRT still runs

log = structlog.get_logger(__name__)


class Served(Protocol):
    """A model that is served, as far as its engines are concerned."""

    @property
    def name(self) -> str:
        """What requests call it."""

    @property
    def sha256(self) -> str:
        """The digest of its ONNX file."""

    @property
    def config(self) -> ModelConfig:
        """How it is served."""

    @property
    def trouble(self) -> str:
        """Why none of its engines can answer."""

    async def switch(self, engines: Sequence[Engine]) -> None:
        """Answer with these engines from now on, and close the others when they are idle."""
        ...


Warm = Callable[[Engine], Awaitable[None]]  # raises ModelRefused


class Acceleration:
    """What the models of one hub share: the GPU's kind, and who builds plans."""

    def __init__(self, launcher: Launcher, directory: Path) -> None:
        """Keep plans in ``directory``; ``find`` must have returned before models are followed."""
        self._launcher = launcher
        self._directory = directory
        self._builder: PlanBuilder | None = None
        self.objection = "nobody has looked for a GPU yet"  # why there is no TensorRT here

    async def find(self, environment: Mapping[str, str] | None = None) -> None:
        """Find out what kind of GPU this is, in a child process that may crash."""
        if environment is None and importlib.util.find_spec("tensorrt") is None:
            self.objection = "TensorRT is not installed: pip install 'fogline[gpu]'"
            return
        try:
            platform = await find_platform(environment=environment)
        except GpuUnavailable as error:
            self.objection = str(error)
            log.info("no TensorRT: ONNX Runtime serves", why=self.objection)
            return
        self._builder = PlanBuilder(
            self._directory,
            platform,
            on_progress=lambda p: log.info("building a plan", model=str(p.model), phase=p.phase),
            environment=environment,
        )
        self.objection = ""

    async def follow(
        self, model: Served, file: Path, parameters: Mapping[str, str], warm: Warm
    ) -> None:
        """Keep a model on the best runtime there is, until cancelled.

        Args:
            model: is served by ONNX Runtime now.
            file: its ONNX file.
            parameters: of its configuration, which may bound its variable dimensions.
            warm: runs the model's warm-up requests.
        """
        builder = self._builder
        if builder is None:
            return
        situation = Situation("onnxruntime")
        plan: Path | None = None
        try:
            profile = _profile(model.config, parameters)
        except PlanRefused as error:
            log.warning("TensorRT will not serve a model", model=model.name, why=str(error))
            return
        while True:
            now = time.monotonic()
            decision = decide(situation, now)
            try:
                match decision.action:
                    case Action.BUILD:
                        plan = await builder.plan(file, model.sha256, profile)
                        situation = replace(situation, plan_is_kept=True)
                    case Action.SWITCH if plan is not None:
                        count = model.config.instances
                        await _switch(model, await self._launcher.open_plans(plan, count), warm)
                        situation = replace(situation, serving="tensorrt")
                        log.info("TensorRT serves", model=model.name, plan=plan.name)
                    case Action.STAY if situation.serving == "tensorrt":
                        await asyncio.sleep(LOOK_S)
                        if model.trouble:
                            raise PlanUnusable(model.trouble)
                    case Action.STAY if decision.again_at is not None:
                        log.info("TensorRT waits", model=model.name, why=decision.reason)
                        await asyncio.sleep(decision.again_at - now)
                    case _:
                        log.info("TensorRT stays out", model=model.name, why=decision.reason)
                        return
            except ModelRefused as error:
                if isinstance(error, PlanUnusable) and plan is not None:
                    builder.plans.drop(plan)
                    plan = None
                if situation.serving == "tensorrt" and not await self._go_back(model, file, warm):
                    continue  # the next look tries again
                situation = _failed(situation, error)

    async def _go_back(self, model: Served, file: Path, warm: Warm) -> bool:
        """Return whether ONNX Runtime has taken over."""
        log.error("TensorRT is lost, ONNX Runtime takes over", model=model.name, why=model.trouble)
        count = model.config.instances
        try:
            await _switch(model, await self._launcher.open_all(file, model.sha256, count), warm)
        except ModelRefused as error:
            log.error("ONNX Runtime cannot take over", model=model.name, why=str(error))
            return False
        return True


def _profile(config: ModelConfig, parameters: Mapping[str, str]) -> Profile:
    return profile_for(
        config.inputs,
        max_batch=config.max_batch_size,
        best_batch=max(config.batching.preferred_batch_sizes, default=0),
        bounds=bounds_from(parameters),
    )


async def _switch(model: Served, engines: Sequence[Engine], warm: Warm) -> None:
    try:
        for engine in engines:
            await warm(engine)
    except BaseException:
        await asyncio.gather(*(engine.close() for engine in engines))
        raise
    await model.switch(engines)  # from here on they are the model's


def _failed(situation: Situation, error: ModelRefused) -> Situation:
    count = situation.failure.count + 1 if situation.failure is not None else 1
    lasting = isinstance(error, PlanRefused) and error.lasting
    failure = Failure(str(error), time.monotonic(), count, lasting)
    return Situation("onnxruntime", failure=failure)
