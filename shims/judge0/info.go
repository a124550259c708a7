package judge0

// Version is that of Judge0 whose API and ids of languages this is. Clients look up there
// which id a language has.
const Version = "1.13.1"

// config is the answer of GET /config_info. The limits are those of dayfly's own kinds; a
// site's kinds may have others.
var config = map[string]any{
	"maintenance_mode": false, "enable_wait_result": true, "enable_batched_submissions": true, "max_submission_batch_size": maxBatch,
	"enable_compiler_options": false, "allowed_languages_for_compile_options": []string{}, "enable_command_line_arguments": false,
	"enable_submission_delete": false, "enable_callbacks": true, "callbacks_max_tries": 3, "callbacks_timeout": 10,
	"enable_additional_files": true, "max_extract_size": maxExtract >> 10, "max_queue_size": 100_000,
	"cpu_time_limit": 1, "max_cpu_time_limit": 10, "cpu_extra_time": 0, "max_cpu_extra_time": 0, "wall_time_limit": 5, "max_wall_time_limit": 60,
	"memory_limit": 65536, "max_memory_limit": 262144, "stack_limit": 65536, "max_stack_limit": 262144,
	"max_processes_and_or_threads": 64, "max_max_processes_and_or_threads": 64, "max_file_size": 16384, "max_max_file_size": 16384,
	"enable_per_process_and_thread_time_limit": false, "allow_enable_per_process_and_thread_time_limit": false,
	"enable_per_process_and_thread_memory_limit": false, "allow_enable_per_process_and_thread_memory_limit": false,
	"number_of_runs": 1, "max_number_of_runs": 1, "redirect_stderr_to_stdout": false, "enable_network": false, "allow_enable_network": false,
	"submission_cache_duration": 0, "use_docs_as_homepage": false, "disable_implicit_base64_encoding": true,
}
