"""How large a job must be for a model and a context, and how fast it would be, from config.json
alone: no weights are read and no torch is imported.

``model`` (config.json -> shapes, by the table of ``families``), ``device`` (rates, links and memory
of a machine), ``memory`` (bytes per rank, largest context), ``predict`` (TTFT and TPOT of each mode
by ``ds_cp.cost``), ``report`` and ``picture``.
"""
