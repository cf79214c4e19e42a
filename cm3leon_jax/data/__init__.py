"""Documents, records, the CM3 objective and row packing; everything is numpy."""
