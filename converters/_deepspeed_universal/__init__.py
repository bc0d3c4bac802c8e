"""Parts of the DeepSpeed universal folder: what it is called, what lies in it, how it is written, read and finished."""
