"""Audio in, batches out: which example comes when (order), what can be read (sources), how a folder
of audio becomes shards (prepare), sounds made on the spot (synthetic), the executors (pipeline)."""
