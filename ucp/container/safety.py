"""Globals that no honest checkpoint names: their presence says that a file was made to attack its reader.

Nothing that a pickle names is ever imported or called, so this list does not protect; it tells the user.
"""

from __future__ import annotations

from ucp.errors import UnsafeError

_MODULES = frozenset(
    "os nt posix sys subprocess shutil importlib imp runpy socket ctypes _ctypes pty tty code codeop pdb bdb pip "
    "webbrowser pickle _pickle cPickle marshal timeit profile cProfile trace doctest asyncio commands popen2 urllib2 "
    "httplib requests ftplib smtplib telnetlib xmlrpc pkgutil zipimport site fileinput setuptools distutils venv "
    "ensurepip idlelib pydoc cffi".split()
)

_MODULE_PREFIXES = (
    "torch.hub",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torch.jit",
    "torch.package",
    "torch.serialization.load",
    "torch.distributed.rpc",
    "torch._inductor",
    "urllib.request",
    "http.client",
    "http.server",
    "numpy.f2py",
    "numpy.testing",
    "numpy.distutils",
)

_BUILTINS = frozenset(
    "eval exec execfile compile open __import__ __build_class__ setattr delattr input raw_input breakpoint globals "
    "locals vars apply reload map filter reduce exit quit".split()
)

_NAMES = frozenset(
    {
        "operator.attrgetter",
        "operator.methodcaller",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "types.CodeType",
        "types.FunctionType",
        "types.LambdaType",
        "types.MethodType",
        "types.ModuleType",
        "io.open",
        "_io.open",
        "_io.FileIO",
        "io.FileIO",
        "io.open_code",
        "functools.reduce",
        "_functools.reduce",
        "codecs.open",
        "torch.load",
        "torch.compile",
        "numpy.load",
        "numpy.fromfile",
        "numpy.memmap",
        "dill.loads",
        "dill._dill.loads",
        "cloudpickle.loads",
        "joblib.load",
        "pandas.eval",
        "pandas.read_pickle",
        "logging.config.listen",
    }
)

_HINT = (
    "nothing of it was run. Do not load this file with anything else; get the checkpoint again from a source you trust"
)


def refuse_malicious(module: str, name: str, *, where: str) -> None:
    """UnsafeError naming file and global if ``module.name`` is something that only an attack names."""
    if is_malicious(module, name):
        raise UnsafeError(f"{where}: asks for {module}.{name}, which could run arbitrary code", hint=_HINT)


def is_malicious(module: str, name: str) -> bool:
    """Whether an honest checkpoint would never name ``module.name``.

    A dotted name may reach a module through another one (``torch.serialization`` + ``os.system``), so each part of it
    but the last counts as a module.
    """
    path = f"{module}.{name}"
    parts = name.split(".")
    if module.partition(".")[0] in _MODULES or not _MODULES.isdisjoint(parts[:-1]):
        return True
    if module == "builtins" and parts[0] in _BUILTINS:
        return True
    if path in _NAMES or any(part.startswith("__") for part in parts[:-1]):
        return True
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in _MODULE_PREFIXES)
