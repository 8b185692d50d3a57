"""Names of the files of one blob in a cache directory: its id, and one of these.

On the way of every start: nothing is imported here.
"""

from __future__ import annotations

STATE_SUFFIX = ".chunk_state"
DATA_SUFFIX = ".blob.data"
# nydusd's.
META_SUFFIX = ".blob.meta"
RECORD_SUFFIX = ".blob.data.chunk_map"
