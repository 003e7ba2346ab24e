"""What a user measured on a real host, read from the text that the kernel's tools print.

One module a format: `ftrace` (with `function_graph`), `lock_stat`, `perf_lock`, `bpftrace`. `read`
tells them apart. All of them give the same thing, `observation.Observation`, from which
`calibrate` makes a machine profile by the rules in `mapping`.
"""
