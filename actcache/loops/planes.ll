; Bytes of %n items of $size, a multiple of $step, to $size planes: the first bytes of all, the second ones of all, and so on.
define void @planes_$size(ptr %from, ptr %to, i64 %n) {
entry:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %items
items:
  %i = phi i64 [ 0, %entry ], [ %i.next, %items ]
  %first = mul i64 %i, $size
  %from.at = getelementptr i8, ptr %from, i64 %first
  %all = load <$all x i8>, ptr %from.at, align 1
  $planes
  %i.next = add i64 %i, $step
  %more = icmp ult i64 %i.next, %n
  br i1 %more, label %items, label %done
done:
  ret void
}
