"""The commands of ``orthorank``, one file each: options, what is printed, the exit code."""
