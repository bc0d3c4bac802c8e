"""ByteCheckpoint folders: DCP's metadata over files of bare tensor bytes."""
