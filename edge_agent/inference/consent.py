"""What the hub may keep of this device's requests to learn from: only what somebody consents to. Pure."""

import difflib
from collections.abc import Collection

from edge_agent.inference.parameters import Options


class Consent:
    """The consent of the agent's configuration; an application's own word on a request beats it."""

    def __init__(self, entries: Collection[str]) -> None:
        """Consent to ``entries``: MODEL, or MODEL/SOURCE for one source of it."""
        self._entries = frozenset(entries)

    def covers(self, model: str, options: Options) -> bool:
        """Return whether somebody consents to the hub keeping a request, and nobody objects."""
        if options.private:
            return False
        if options.keep is not None:
            return options.keep
        entries = self._entries
        return bool(entries) and (model in entries or f"{model}/{options.source}" in entries)

    def idle(self, served: Collection[str]) -> list[str]:
        """Return a sentence for each entry whose model is not among those ``served``."""
        known = ", ".join(sorted(served)) or "none so far"
        sentences = []
        for entry in sorted(self._entries):
            model = entry.partition("/")[0]
            if model not in served:
                near = difflib.get_close_matches(model, served, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                sentences.append(
                    f"keep {entry}: this device serves no model {model}, only {known}{meant}"
                )
        return sentences
