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

; Items whose $size planes of %n bytes are at %planes, to rows of %d items, a multiple of $step, in %slots of a window, %stride
; bytes apart, around the caches; those %chosen, or the first ones.
define void @woven_$size(ptr %planes, i64 %n, i64 %d, ptr %slots, ptr %chosen, i64 %rows, ptr %window, i64 %stride) {
entry:
  %is_empty = icmp eq i64 %rows, 0
  %takes_first = icmp eq ptr %chosen, null
  br i1 %is_empty, label %done, label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r.next, %row.end ]
  br i1 %takes_first, label %known, label %look
look:
  %chosen.at = getelementptr i64, ptr %chosen, i64 %r
  %looked = load i64, ptr %chosen.at
  br label %known
known:
  %from = phi i64 [ %r, %row ], [ %looked, %look ]
  %slot.at = getelementptr i64, ptr %slots, i64 %r
  %slot = load i64, ptr %slot.at
  %target.offset = mul i64 %slot, %stride
  %target = getelementptr i8, ptr %window, i64 %target.offset
  %row.first = mul i64 %from, %d
  br label %items
items:
  %c = phi i64 [ 0, %known ], [ %c.next, %items ]
  %i = add i64 %row.first, %c
  $woven
  %c.bytes = mul i64 %c, $size
  %to = getelementptr i8, ptr %target, i64 %c.bytes
  store <$all x i8> %all, ptr %to, align 64, !nontemporal !0
  %c.next = add i64 %c, $step
  %more = icmp ult i64 %c.next, %d
  br i1 %more, label %items, label %row.end
row.end:
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %rows
  br i1 %more.rows, label %row, label %done
done:
  fence seq_cst
  ret void
}
