"""nginx serving a folder: reads with ranges, no lists. Tests put files into `Nginx.root`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tests.servers.endpoint import Endpoint
from tests.servers.installed import missing_file, servers_folder
from tests.servers.server import Server, answers

_PROGRAM = "root/usr/sbin/nginx"
_CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    types {{ }}
    default_type application/octet-stream;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {folder}/files;
    }}
}}
"""


class Nginx(Server):
    name: ClassVar[str] = "nginx"

    @classmethod
    def missing(cls) -> str:
        return missing_file(_PROGRAM)

    @property
    def root(self) -> Path:
        """What it serves."""
        return self.folder / "files"

    @property
    def endpoint(self) -> Endpoint:
        """`key` is the folder it serves, so that users of a shared one can put files there."""
        return Endpoint("http", f"http://127.0.0.1:{self.port()}", key=str(self.root))

    def start(self) -> None:
        self.root.mkdir(exist_ok=True)
        configuration = self.folder / "nginx.conf"
        configuration.write_text(_CONFIGURATION.format(folder=self.folder, port=self.port()))
        self.launch([servers_folder() / _PROGRAM, "-c", configuration, "-e", self.folder / "nginx.log"])
        self.wait(lambda: answers(self.endpoint.address), "nginx")
