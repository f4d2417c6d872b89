; Loops that need an instruction of one kind of processor: crc32. They follow those of loops.ll and a @crc32c.

; Chunks from files to their slots: read, compared, scattered. Says how many; the next one is not as it should be, or %n.
; %work, for each: file, first byte, bytes, crc32c, slots, rows chosen (0: the first), slots in number, where in %memory.
define i64 @bring(ptr %work, i64 %n, ptr %memory, ptr %window, i64 %stride, i64 %row_bytes, ptr %shift, ptr %cycles) {
entry:
  br label %chunk
chunk:
  %i = phi i64 [ 0, %entry ], [ %i.next, %put ]
  %read = phi i64 [ 0, %entry ], [ %read.next, %put ]
  %compared = phi i64 [ 0, %entry ], [ %compared.next, %put ]
  %scattered = phi i64 [ 0, %entry ], [ %scattered.next, %put ]
  %is_more = icmp ult i64 %i, %n
  br i1 %is_more, label %get, label %done
get:
  %one = getelementptr [8 x i64], ptr %work, i64 %i
  %file.wide = load i64, ptr %one
  %file = trunc i64 %file.wide to i32
  %first.at = getelementptr i64, ptr %one, i64 1
  %first = load i64, ptr %first.at
  %bytes.at = getelementptr i64, ptr %one, i64 2
  %bytes = load i64, ptr %bytes.at
  %crc.at = getelementptr i64, ptr %one, i64 3
  %crc = load i64, ptr %crc.at
  %slots.at = getelementptr i64, ptr %one, i64 4
  %slots = load ptr, ptr %slots.at
  %chosen.at = getelementptr i64, ptr %one, i64 5
  %chosen = load ptr, ptr %chosen.at
  %slots.n.at = getelementptr i64, ptr %one, i64 6
  %slots.n = load i64, ptr %slots.n.at
  %lead.at = getelementptr i64, ptr %one, i64 7
  %lead = load i64, ptr %lead.at
  %to = getelementptr i8, ptr %memory, i64 %lead
  %cycle.0 = call i64 @llvm.readcyclecounter()
  %got = call i64 @pread(i32 %file, ptr %to, i64 %bytes, i64 %first)
  %is_all = icmp eq i64 %got, %bytes
  br i1 %is_all, label %compare, label %done
compare:
  %cycle.1 = call i64 @llvm.readcyclecounter()
  %crc.found = call i32 @crc32c(ptr %to, i64 %bytes, ptr %shift, i32 0)
  %crc.wide = zext i32 %crc.found to i64
  %is_right = icmp eq i64 %crc.wide, %crc
  br i1 %is_right, label %put, label %done
put:
  %cycle.2 = call i64 @llvm.readcyclecounter()
  call void @scatter(ptr %window, i64 %stride, ptr %slots, ptr %to, i64 %row_bytes, ptr %chosen, i64 %slots.n)
  %cycle.3 = call i64 @llvm.readcyclecounter()
  %read.took = sub i64 %cycle.1, %cycle.0
  %read.next = add i64 %read, %read.took
  %compared.took = sub i64 %cycle.2, %cycle.1
  %compared.next = add i64 %compared, %compared.took
  %scattered.took = sub i64 %cycle.3, %cycle.2
  %scattered.next = add i64 %scattered, %scattered.took
  %i.next = add i64 %i, 1
  br label %chunk
done:
  store i64 %read, ptr %cycles
  %compared.to = getelementptr i64, ptr %cycles, i64 1
  store i64 %compared, ptr %compared.to
  %scattered.to = getelementptr i64, ptr %cycles, i64 2
  store i64 %scattered, ptr %scattered.to
  ret i64 %i
}
declare i64 @llvm.x86.sse42.crc32.64.64(i64, i64)
declare i32 @llvm.x86.sse42.crc32.32.8(i32, i8)
declare i64 @llvm.readcyclecounter()
declare i64 @pread(i32, ptr, i64, i64)
