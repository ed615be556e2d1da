"""Which kernel tests a GPU can judge: those that run kernels on it.

The others compile for absent GPUs, read sources, or test PyTorch code and the checks of arguments, which are the same
on every machine: `make test` runs them. In the interpreter each test is held to what stands here (`conftest.py`).
"""

import pytest

# Modules, without the ending, of which a GPU judges nothing.
ELSEWHERE = {
    "test_checks",
    "test_compile",
    "test_counts",
    "test_fullgraph",
    "test_fuzz_ops",
    "test_hashing",
    "test_hopper",
    "test_hopper_compile",
    "test_launch_keys",
    "test_launch_trace",
    "test_library",
    "test_offsets",
    "test_reference",
    "test_refused_values",
    "test_rotary_errors",
    "test_settings",
    "test_specialisation",
    "test_supported",
    "test_tuning_run",
}
# Tests of other modules that launch none.
NOT = {
    "test_selection_largest": {"test_the_reference_says_the_same", "test_what_excludes_each_other"},
    "test_activation": {
        "test_empty_dimensions",
        "test_errors_name_the_argument_and_the_fix",
        "test_gradients_are_exact",
        "test_what_no_kernel_does",
    },
    "test_kv_cache": {
        "test_errors_name_the_argument_and_the_fix",
        "test_gradients_are_exact",
        "test_what_autograd_does_not_let_be_written_is_refused_by_name",
    },
    "test_low_rank": {
        "test_errors_name_the_argument_and_the_fix",
        "test_gradients_are_exact",
        "test_what_no_kernel_does",
    },
    "test_add_norm": {
        "test_errors_name_the_argument_and_the_fix",
        "test_gradients_are_exact",
        "test_what_no_kernel_does",
    },
    "test_attention": {
        "test_every_group_fills_its_tiles",
        "test_long_prompts_in_pytorch",
        "test_products_of_float32_are_exact",
    },
    "test_attention_calls": {
        "test_bad_inputs",
        "test_gradients",
        "test_pytorch_never_holds_selected_by_keys",
        "test_what_the_kernel_does_not_take",
    },
    "test_attention_options": {
        "test_bad_options",
        "test_gradients",
        "test_pytorch_holds_a_block_of_scores",
    },
    "test_attention_paged": {
        "test_the_layouts_differ_in_memory",
        "test_pytorch_reads_what_is_needed_alone",
    },
    "test_attention_paged_calls": {
        "test_a_launcher_gets_the_views_as_they_are",
        "test_bad_inputs",
        "test_gradients_into_the_cache",
    },
    "test_attention_pairs": {
        "test_little_is_computed_in_vain",
    },
    "test_attention_rotary": {
        "test_the_reference_rotates_too",
        "test_errors_name_the_argument",
    },
    "test_attention_varlen": {
        "test_bad_inputs",
        "test_gradients",
    },
    "test_bad_inputs": {
        "test_a_full_disk_gives_a_sentence_and_no_traceback",
        "test_a_scatter_into_its_own_rows_is_refused",
        "test_an_output_over_an_input_is_refused_and_both_are_named",
        "test_gpus_before_sm_80_are_said_to_be_a_guess",
        "test_memory_that_is_shared_is_seen",
        "test_odd_devices",
        "test_other_integers_are_refused_with_the_cure",
        "test_sinks_without_a_number_are_refused",
        "test_two_outputs_in_one_memory_are_refused",
        "test_vmap_over_a_kernel_says_what_would_work",
        "test_warmup_without_the_gpu_that_is_named",
        "test_what_may_be_an_output_is_taken_as_the_same_view_alone",
    },
    "test_hints": {
        "test_what_is_said_works",
        "test_the_error_says_what_to_do",
    },
    "test_far_views": {
        "test_every_op_is_here",
    },
    "test_graphs": {
        "test_a_wait_would_be_seen",
        "test_every_op_that_returns_something_takes_memory_of_the_caller",
        "test_kernels_run_on_the_device_of_the_tensors",
        "test_no_op_waits_for_the_device",
        "test_one_launch",
        "test_results_are_new_memory",
        "test_what_is_promised_to_a_compiler_is_what_a_launcher_returns",
        "test_with_memory_of_the_caller_nothing_is_allocated",
    },
    "test_rms_norm_select": {
        "test_an_input_that_requires_grad_takes_pytorch",
        "test_errors_name_the_argument",
        "test_room_to_count_is_made_for_the_rows_that_are_counted",
    },
    "test_rotary": {
        "test_empty_dimensions",
        "test_gradients_are_exact",
    },
    "test_rows": {
        "test_an_explicit_backend_never_falls_back",
        "test_errors_name_the_argument_and_the_fix",
        "test_gradients_are_exact",
    },
    "test_scoring": {
        "test_empty_inputs",
        "test_errors_name_the_argument",
        "test_gradients_flow_through_norm_and_score",
        "test_norm_is_that_of_hugging_face_bit_for_bit",
    },
    "test_scoring_options": {
        "test_gemma_is_that_of_hugging_face",
        "test_gradients_flow_through_every_option",
    },
    "test_scoring_packed": {
        "test_errors_name_the_argument",
        "test_no_tokens",
    },
    "test_selection": {
        "test_errors_name_the_argument",
        "test_scores_that_require_grad_are_selected_from",
        "test_pytorch_reads_no_value_on_the_host",
    },
    "test_selection_packed": {
        "test_errors_name_the_argument",
        "test_pytorch_reads_no_value_on_the_host",
    },
    "test_selection_threshold": {
        "test_errors_name_the_argument",
    },
    "test_transforms": {
        "test_a_choice_has_no_derivative_and_says_none",
        "test_a_kernel_refuses_what_wants_a_tangent_or_a_gradient",
        "test_what_is_missing_takes_no_tangent_from_the_rest",
    },
    "test_tuning": {
        "test_a_default_that_cannot_be_launched_is_an_error",
        "test_a_hair_faster_is_not_faster",
        "test_autotune_measures_nothing_while_a_graph_is_captured",
        "test_autotune_that_fails_costs_no_request",
        "test_candidates_are_distinct_begin_with_the_default_and_fit",
        "test_candidates_of_every_op_are_legal_and_distinct",
        "test_every_op_with_settings_has_a_problem",
        "test_help_lists_the_command",
        "test_nothing_is_measured_without_being_asked_for",
        "test_the_command_refuses_without_a_gpu_in_one_sentence",
        "test_the_command_writes_what_it_measured",
        "test_the_fastest_wins",
        "test_what_cannot_be_launched_or_is_wrong_never_wins",
        "test_what_is_known_to_lose_is_not_compiled",
        "test_what_was_measured_is_read_by_the_next_launch_and_added_to",
        "test_with_autotune_the_first_launch_measures_and_keeps",
        "test_wrong_input_is_exit_code_2",
    },
    "test_work_order": {
        "test_more_programs_than_32_bits_number_are_refused",
        "test_splits_begin_where_a_third_would_be_idle",
    },
    "test_warmup": {
        "test_nothing_is_left_to_compile",
        "test_on_a_cpu_there_is_nothing_to_compile",
        "test_wrong_arguments",
    },
}
# Tests that leave the backend to the device: on a CPU they run the reference.
BY_DEVICE = {
    "test_a_compiled_function_is_one_graph",
    "test_a_real_measurement",
    "test_an_input_that_requires_grad_takes_pytorch",
    "test_both_modes_give_the_slope",
    "test_compiles_as_one_graph",
    "test_compiles_into_one_graph",
    "test_extents_past_32_bits_on_a_gpu",
    "test_gather_after_scatter_gives_the_rows_back",
    "test_it_compiles_into_one_graph",
    "test_memory_that_is_written_twice_is_refused",
    "test_more_than_2_to_31_elements",
    "test_opcheck",
    "test_operator_passes_opcheck",
    "test_operator_with_out_passes_opcheck",
    "test_operators_keep_their_promises_to_torch",
    "test_out_has_no_gradient",
    "test_out_in_a_compiled_graph",
    "test_rotation_keeps_lengths",
    "test_the_operator_keeps_its_promises_to_torch",
    "test_variants_differ_from_each_other",
    "test_vmap_is_the_loop_or_an_error",
}
# Tests whose shapes are empty in part, so that there may be nothing to launch, and one that runs both backends.
EMPTY = {"test_empty_dimensions", "test_empty_inputs"}
BOTH = {"test_one_sink_for_all_sequences"}


def uses_gpu(item: pytest.Item) -> bool:
    """Whether the outcome of the test depends on what a GPU computes; of `tests/ptx` that of its probes alone does."""
    name = getattr(item, "originalname", None)
    if item.path.parent.name == "ptx":
        return name == "test_a_gpu_gives_what_the_table_says"
    module = item.path.stem
    if name is None or module in ELSEWHERE or name in NOT.get(module, ()):  # an example in a docstring has no name
        return False
    return name in BOTH or "torch" not in _texts(item)


def must_launch(item: pytest.Item) -> bool:
    """Whether the test runs kernels in the interpreter, too: not those that leave the backend to the device."""
    name = getattr(item, "originalname", None)
    return uses_gpu(item) and name not in BY_DEVICE | EMPTY and "auto" not in _texts(item)


def _texts(item: pytest.Item) -> list[str]:
    """The test's parameters that are words."""
    call = getattr(item, "callspec", None)
    return [] if call is None else [value for value in call.params.values() if isinstance(value, str)]
