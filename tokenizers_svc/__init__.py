"""Token ids over HTTP: the library's tokenizer behind FastAPI, with batches across requests."""
