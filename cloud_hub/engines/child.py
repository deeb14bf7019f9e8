"""Where the child process of an engine begins: becomes a worker without disturbing its hub.

Starting is mostly importing, so what ``worker.py`` needs is imported at low priority.
"""

import importlib

from cloud_hub.engines.priority import at_low_priority

if __name__ == "__main__":
    at_low_priority(lambda: importlib.import_module("cloud_hub.engines.worker")).main()
