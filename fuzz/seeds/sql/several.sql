-- one; two
INSERT INTO t SELECT ';', $tag$;$tag$, "a;b", E'\';' FROM message;
/* ; /* ; */ */ DELETE FROM ü WHERE x = 'ä;ö' ;;
;