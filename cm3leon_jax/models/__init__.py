"""NNX modules, used as immutable pytrees; they know no files, configs or meshes."""
