# One cubin and, beside it, the report of ptxas (registers, spills, shared memory) as CUBIN.ptxas.txt.
# Run as `cmake -DNVCC= -DSOURCE= -DCUBIN= -DINCLUDES= -DFLAGS= -P`; a script, since the report must be
# kept and the compiler's words still be seen where it fails.
execute_process(
  COMMAND
    "${NVCC}" -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -cubin -Xptxas -v
    --split-compile=0 ${FLAGS} ${INCLUDES} -MD -MF "${CUBIN}.d" -o "${CUBIN}" "${SOURCE}"
  OUTPUT_VARIABLE report
  ERROR_VARIABLE report
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "nvcc failed on ${SOURCE}:\n${report}")
endif()
file(WRITE "${CUBIN}.ptxas.txt" "${report}")
string(REGEX MATCHALL "[^\n]*warning[^\n]*" warnings "${report}")
foreach(warning IN LISTS warnings)
  message("${warning}")
endforeach()
