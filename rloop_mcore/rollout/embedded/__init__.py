"""The embedded engine: SGLang's HTTP contract over a transformers model, for machines where SGLang does not run."""

KEY_VARIABLE = "RLOOP_ENGINE_KEY"  # the environment variable that carries the server's key
