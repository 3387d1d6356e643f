"""A student as others use it: `export` writes its folder, `runtime` reads it without torch."""
