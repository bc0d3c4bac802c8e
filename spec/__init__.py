"""The normative texts and schemas, installed as the data of ``ucp.spec`` (read them with ``importlib.resources``)."""
